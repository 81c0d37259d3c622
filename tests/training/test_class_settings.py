"""Settings that are classes: margins and optimizers by name and by import path, their help, files of earlier
versions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launched import logged
from torch import nn

from partial_fc.margins import ArcFace, CombinedMargin, CosFace, NormFace, Softmax, SphereFace, SubCenterArcFace
from partial_fc.margins.adaptive import AdaFace, AdaptiveMargin, CurricularFace, ElasticFace, MagFace
from partial_fc.margins.sphereface2 import SphereFace2
from partial_fc.training.class_settings import TRUST
from partial_fc.training.cli.main import main, train_parser
from partial_fc.training.config import (
    HeadConfig,
    MarginSettings,
    OptimizerSettings,
    RunConfig,
    check_resumes,
    flat,
    save_config,
    to_config,
)
from partial_fc.training.errors import UserError

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
OWN = """
from pathlib import Path
import torch
from partial_fc import AdaptiveMargin, Margin

class MyMargin(Margin):
    '''Less margin for short embeddings.

    Args:
        scale: factor of the cosines
        x: how much
    '''
    def __init__(self, scale: float = 64.0, x: int = 1):
        super().__init__(scale)
        if x < 0:
            raise ValueError(f"x must be at least 0, not {x}")
        self.x = x

    def target(self, cosine, positives):
        return cosine - 0.1 * self.x

class Untyped(Margin):
    def __init__(self, scale=64.0, m=0.35):
        super().__init__(scale)
        self.m = m

    def target(self, cosine, positives):
        return cosine - self.m

class OfCounts(AdaptiveMargin):
    def __init__(self, bonus: float = 0.0, **options):
        super().__init__(**options)
        self.bonus = bonus

class MySGD(torch.optim.SGD):
    '''SGD.'''
    def __init__(self, params, lr: float = 0.05, **options):
        super().__init__(params, lr=lr, **options)

class Cut(torch.optim.Adam):
    '''Adam, for the head without.'''
    def __init__(self, params, lr: float = 0.05, cut: float = 1.0):
        super().__init__(params, lr=lr)

    @staticmethod
    def for_head(arguments):
        return torch.optim.SGD, {"momentum": arguments["cut"]}
"""


@pytest.fixture
def own(tmp_path, monkeypatch, request) -> str:
    """The name of a module with margins and optimizers; of its own in each test, because a name on a command line is
    trusted."""
    name = f"own_{re.sub('[^a-z_]', '_', request.node.name)}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return name


def read(text: str, tmp_path: Path, *arguments: str) -> RunConfig:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return to_config(train_parser(), ["--config", str(path), *arguments])


def refused(text: str, tmp_path: Path, capsys: Any, *arguments: str) -> str:
    """The one line of standard error."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert main(["train", str(path), "--output.folder", str(tmp_path / "run"), "--check", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def same(margin: Any, expected: Any) -> bool:
    """Whether two margins are of one class with the same settings and buffers."""
    buffers = [{name: value.tolist() for name, value in each.named_buffers()} for each in (margin, expected)]
    return margin.describe() == expected.describe() and buffers[0] == buffers[1]


# --------------------------------------------------------------------------------------------------- names and defaults


def test_the_defaults_are_those_of_the_classes():
    config = to_config(train_parser(), [])
    assert config == RunConfig()
    assert same(config.head.margin.build_margin(torch.ones(3)), ArcFace())
    optimizer = config.optimizers.build([nn.Parameter(torch.ones(1))])
    given = {name: optimizer.defaults[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
    assert given == {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": False}


@pytest.mark.parametrize(
    ("text", "arguments", "margin"),
    [
        ("head: {margin: AdaFace}", "", MarginSettings("AdaFace")),
        ("head: {margin: {class_path: AdaFace, init_args: {h: 0.33}}}", "", MarginSettings("AdaFace", {"h": 0.33})),
        ("head: {margin: {class_path: partial_fc.margins.AdaFace}}", "", MarginSettings("AdaFace")),
        ("head: {margin: {class_path: partial_fc.AdaFace}}", "", MarginSettings("AdaFace")),
        ("head: {margin: {init_args: {scale: 8}}}", "", MarginSettings("ArcFace", {"scale": 8.0})),
        ("head: {sample_rate: 0.5}", "--head.margin=CosFace --head.margin.margin=0.2", MarginSettings("CosFace", {"margin": 0.2})),
        # another class keeps what was given and fits, and no default of the old class
        (
            "head: {margin: {class_path: ArcFace, init_args: {scale: 32, margin: 0.5, gradient: exact}}}",
            "--head.margin CosFace",
            MarginSettings("CosFace", {"scale": 32.0}),
        ),
        ("head: {margin: {class_path: ArcFace, init_args: {scale: 32}}}", "--head.margin Softmax", MarginSettings("Softmax")),
        (
            "head: {margin: {class_path: ArcFace, init_args: {scale: 32}}}",
            "--head.margin ArcFace --head.margin.scale 64",
            MarginSettings("ArcFace"),
        ),
    ],
)  # fmt: skip
def test_margins_in_files_and_on_the_command_line(tmp_path, text, arguments, margin):
    assert read(f"{text}\n", tmp_path, *arguments.split()).head.margin == margin


@pytest.mark.parametrize(
    ("text", "arguments", "optimizer"),
    [
        ("optimizer: {lr: 0.5}", "", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0005}),
        ("optimizer: {init_args: {momentum: 0}}", "", {"lr": 0.1, "weight_decay": 0.0005}),
        ("seed: 1", "--optimizer.lr 0.5", {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0005}),
        ("seed: 1", "--optimizer SGD --optimizer.nesterov true", {**RunConfig().optimizer.init_args, "nesterov": True}),
    ],
)
def test_arguments_of_the_default_hold_while_the_class_is_the_default(tmp_path, text, arguments, optimizer):
    assert read(f"{text}\n", tmp_path, *arguments.split()).optimizer == OptimizerSettings("SGD", optimizer)


def test_another_optimizer_has_its_own_defaults(tmp_path):
    assert read("optimizer: AdamW\n", tmp_path).optimizer == OptimizerSettings("AdamW")
    text = "optimizer: {class_path: AdamW, init_args: {lr: 2e-3, betas: [0.8, 0.9]}}\nhead_optimizer: SGD\n"
    config = read(text, tmp_path, "--head_optimizer.lr", "2.0")
    assert config.optimizer == OptimizerSettings("AdamW", {"lr": 0.002, "betas": (0.8, 0.9)})
    assert config.optimizers.head_class() == (torch.optim.SGD, {"lr": 2.0})
    assert read(text, tmp_path, "--head_optimizer", "null").head_optimizer is None


def test_settings_are_saved_with_all_arguments_and_read_again(tmp_path):
    text = "optimizer: {class_path: AdamW, init_args: {betas: [0.8, 0.9]}}\nhead_optimizer: {class_path: SGD}\nhead_lr_factor: 1\n"
    config = read(text, tmp_path, "--head.margin", "AdaFace", "--head.margin.h", "0.5")
    save_config(config, tmp_path / "saved.yaml")
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text())
    assert saved["head"]["margin"] == {
        "class_path": "AdaFace",
        "init_args": {"scale": 64.0, "margin": 0.4, "h": 0.5, "momentum": 0.01},
    }
    assert saved["optimizer"]["init_args"]["betas"] == [0.8, 0.9] and saved["optimizer"]["init_args"]["lr"] == 1e-3
    again = to_config(train_parser(), ["--config", str(tmp_path / "saved.yaml")])
    assert again == config
    check_resumes(again, config, "run")
    assert flat(config)["head.margin"] == "AdaFace" and flat(config)["head.margin.h"] == 0.5
    other = to_config(train_parser(), ["--config", str(tmp_path / "saved.yaml"), "--head.margin", "CosFace"])
    assert other.head.margin == MarginSettings("CosFace"), (
        "defaults of AdaFace that were saved are not those of CosFace"
    )
    with pytest.raises(UserError, match=r"run was run with head.margin = 'AdaFace', and this asks for 'CosFace'"):
        check_resumes(other, config, "run")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: {margin: AdaFaze}", "--head.margin is AdaFaze; choose one of AdaFace, AdaptiveMargin, ArcFace, "),
        ("head: {margin: {class_path: AdaFaze}}", "or give a class of your own by its import path, package.Margin"),
        ("head: {margin: null}", "--head.margin is null; choose one of AdaFace"),
        ("head: {margin: 3}", "head.margin is 3; give the name of a class, or {class_path: CLASS"),
        ("head: {margin: [AdaFace]}", "head.margin is ['AdaFace']; give the name of a class"),
        ("head: {margin: {class_path: ArcFace, scale: 3}}", "head.margin: scale stands beside class_path; write arguments into"),
        ("head: {margin: {class_path: ArcFace, init_args: {h: 3}}}", "--head.margin.h: ArcFace has no argument h; it takes scale, "),
        ("head: {margin: {class_path: ArcFace, init_args: {scale: wide}}}", "Expected a <class 'float'>"),
        ("head: {margin: {class_path: ElasticFace, init_args: {kind: tan}}}", "Expected a typing.Literal['arc', 'cos']"),
        ("head: {margin: {class_path: ArcFace, init_args: {scale: -1}}}", "--head.margin ArcFace: scale must be a positive number"),
        ("head: {margin: {class_path: torch.optim.SGD}}", "is not a subclass of Margin"),
        ("head: {margin: {class_path: AdaptiveMargin, init_args: {class_counts: [1]}}}", "AdaptiveMargin has no argument class_counts"),
        ("optimizer: {class_path: SGD, init_args: {params: []}}", "SGD has no argument params"),
        ("optimizer: sgd", "--optimizer is sgd; choose one of SGD, Adam, "),
        ("head: {margin: ArcFace, scale: 3}", "write head: {margin: {class_path: ArcFace, init_args: {scale: 3}}}"),
        ("head: {margin: {class_path: AdaFace}, m: 0.3}", "write head: {margin: {class_path: AdaFace, init_args: {margin: 0.3}}}"),
    ],
)  # fmt: skip
def test_what_no_class_takes_is_one_line(tmp_path, capsys, text, words):
    assert words in refused(f"{text}\n", tmp_path, capsys)


# ---------------------------------------------------------------------------------------------------- help


def help_of(capsys: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["train", *arguments])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "name", "kind"),
    [
        *(("head.margin", name, MarginSettings) for name in MarginSettings.names),
        *(("optimizer", name, OptimizerSettings) for name in ("SGD", "AdamW", "LARS", "Ranger")),
        ("head_optimizer", "SGD", OptimizerSettings),
    ],
)
def test_every_class_has_a_help_of_its_own(capsys, option, name, kind):
    text = help_of(capsys, f"--{option}.help", name)
    shown = re.findall(rf"^  --{re.escape(option)}\.(\w+)", text, re.MULTILINE)
    assert shown == kind.takes(name, option) and shown
    assert not {"params", "class_counts"} & set(shown)
    assert "default: " in text
    if kind is MarginSettings:
        for argument in shown:
            explained = re.search(rf"^  --{option}\.{argument} .*?(?=^  --|\Z)", text, re.MULTILINE | re.DOTALL)[0]
            words = explained.split(None, 2)[2]
            assert len(words.split("(type: ")[0].split()) > 1, f"{name}: {explained}"


def test_the_help_of_all_settings_names_the_classes(capsys):
    text = " ".join(help_of(capsys, "--help").split())
    assert "(default: ArcFace; classes: AdaFace, AdaptiveMargin, ArcFace, " in text
    assert "(default: SGD with lr 0.1, momentum 0.9, weight_decay 0.0005; classes: SGD, Adam, AdamW, " in text
    assert "--head.margin.help" in text and "--optimizer.help" in text and "--head_optimizer.help" in text
    assert "known subclasses" not in text and len(text) < 27_000


def test_the_help_of_a_misspelt_class_lists_the_classes(mistake):
    assert "choose one of AdaFace, AdaptiveMargin, ArcFace" in mistake("train", "--head.margin.help", "ArcFaze")


# -------------------------------------------------------------------------------------------------- classes of the user


def test_a_margin_of_ones_own(own, tmp_path, capsys):
    config = to_config(train_parser(), ["--head.margin", f"{own}.MyMargin", "--head.margin.x", "3"])
    assert config.head.margin == MarginSettings(f"{own}.MyMargin", {"x": 3})
    head = config.head.build(4, torch.ones(5), 0, torch.device("cpu"))
    assert (type(head.margin).__name__, head.margin.x, head.margin.scale) == ("MyMargin", 3, 64.0)
    config = to_config(train_parser(), ["--head.margin", f"{own}.Untyped", "--head.margin.m", "0.2"])
    assert config.head.margin.build_margin(torch.ones(2)).m == 0.2
    text = help_of(capsys, "--head.margin.help", f"{own}.MyMargin")
    assert "Less margin for short embeddings" in text and "how much (type: int, default: 1)" in text
    for arguments, words in (
        ("--head.margin.x -1", "--head.margin MyMargin: x must be at least 0, not -1"),
        (
            "--head.margin.y 1",
            f"MyMargin has no argument y; it takes scale, x (--head.margin.help {own}.MyMargin explains",
        ),
        ("--head.margin.x many", "Expected a <class 'int'>"),
    ):
        assert words in refused("seed: 0\n", tmp_path, capsys, "--head.margin", f"{own}.MyMargin", *arguments.split())
    for path, words in (
        (f"{own}.Nothing", f"--head.margin {own}.Nothing cannot be imported"),
        ("no_such_package.Margin", "no_such_package.Margin cannot be imported: No module named 'no_such_package'"),
        (f"{own}.MySGD", f"--head.margin {own}.MySGD is not a subclass of Margin"),
    ):
        assert words in refused("seed: 0\n", tmp_path, capsys, "--head.margin", path)


def test_a_margin_of_ones_own_gets_the_counts_of_the_data(own):
    config = to_config(train_parser(), ["--head.margin", f"{own}.OfCounts", "--head.margin.bonus", "0.5"])
    margin: Any = config.head.margin.build_margin(torch.tensor([1, 16, 81]))
    assert margin.bonus == 0.5 and margin.margins.tolist() == AdaptiveMargin([1, 16, 81]).margins.tolist()
    config = to_config(train_parser(), ["--head.margin", f"{own}.OfCounts", "--head.margin.largest", "0.2"])
    assert config.head.margin.build_margin(torch.tensor([1, 16])).largest == 0.2


def test_optimizers_of_ones_own(own, tmp_path, capsys):
    asked = ["--optimizer", f"{own}.MySGD", "--optimizer.momentum", "0.5"]
    config = to_config(train_parser(), [*asked, "--head_lr_factor", "2"])
    assert config.optimizer == OptimizerSettings(f"{own}.MySGD", {"momentum": 0.5})
    optimizer = config.optimizers.build([nn.Parameter(torch.ones(1))])
    assert (type(optimizer).__name__, optimizer.defaults["lr"], optimizer.defaults["momentum"]) == ("MySGD", 0.05, 0.5)
    cls, options = config.optimizers.head_class()
    assert cls is type(optimizer) and options == {"lr": 0.1, "momentum": 0.5}
    config = to_config(train_parser(), ["--optimizer", f"{own}.Cut", "--optimizer.cut", "0.3"])
    assert config.optimizers.head_class() == (torch.optim.SGD, {"momentum": 0.3, "lr": 0.05})
    assert "cut" in help_of(capsys, "--optimizer.help", f"{own}.Cut")
    assert "MySGD has no argument nothing" in refused("seed: 0\n", tmp_path, capsys, *asked, "--optimizer.nothing", "1")


@pytest.mark.parametrize("option", ["head.margin", "optimizer", "head_optimizer"])
def test_a_file_names_a_class_of_ones_own_only_if_it_is_trusted(own, tmp_path, monkeypatch, capsys, option):
    import sys

    path = f"{own}.MyMargin" if option == "head.margin" else f"{own}.MySGD"
    text = f"head: {{margin: {path}}}\n" if option == "head.margin" else f"{option}: {{class_path: {path}}}\n"
    said = refused(text, tmp_path, capsys)
    assert f"{option} names code that would be imported and run: {path}" in said and "settings.yaml" in said
    assert f"{TRUST}={own}" in said and f"--{option} {path}" in said
    assert own not in sys.modules
    monkeypatch.setenv(TRUST, f"another, {own}")
    assert flat(read(text, tmp_path))[option] == path
    monkeypatch.setenv(TRUST, "not-a-package")
    assert f"{TRUST} lists 'not-a-package'" in refused(text, tmp_path, capsys)
    monkeypatch.delenv(TRUST)
    assert flat(read(text, tmp_path, f"--{option}", path))[option] == path
    assert flat(read(text, tmp_path))[option] == path, "named on a command line of this process"


# ---------------------------------------------------------------------------------------------------- earlier versions

OLD_MARGINS = [
    ("margin: softmax", Softmax()),
    ("margin: normface, scale: 32", NormFace(32.0)),
    ("margin: sphereface, m: 1.4", SphereFace(64.0, 1.4)),
    ("margin: cosface, m: 0.4, scale: 64.0", CosFace(64.0, 0.4)),
    ("margin: arcface, scale: 32.0", ArcFace(32.0)),
    ("margin: combined, m1: 1.1, m3: 0.1", CombinedMargin(64.0, 1.1, 0.5, 0.1)),
    ("margin: combined, m1: 1.0, m2: 0.4, m3: 0.0", CombinedMargin(64.0, 1.0, 0.4, 0.0)),
    ("margin: subcenter, centers: 2", SubCenterArcFace(64.0, 0.5, 2)),
    ("margin: curricular, statistics_momentum: 0.2", CurricularFace(momentum=0.2)),
    ("margin: adaface, h: 0.5, statistics_momentum: 0.2", AdaFace(h=0.5, momentum=0.2)),
    ("margin: magface, l_a: 5, u_a: 50, l_m: 0.2, u_m: 0.3, lambda_g: 7", MagFace(64.0, 5.0, 50.0, 0.2, 0.3, 7.0)),
    ("margin: elastic_arc, sigma: 0.1", ElasticFace(deviation=0.1)),
    ("margin: elastic_cos, plus: true", ElasticFace(kind="cos", plus=True)),
    ("margin: adaptive, l_m: 0.1, u_m: 0.2", AdaptiveMargin([1, 16, 81], largest=0.2, smallest=0.1)),
    ("margin: sphereface2, t: 4, balance: 0.6", SphereFace2(t=4.0, balance=0.6)),
    ("scale: 20", ArcFace(20.0)),
    ("m: 0.3", ArcFace(margin=0.3)),
]
UNSET = "m: null, m1: 1.0, m2: 0.5, m3: 0.0, scale: null, centers: null, l_a: null, u_a: null, l_m: null, u_m: null, "
UNSET += "lambda_g: null, h: null, statistics_momentum: null, sigma: null, plus: false, t: null, balance: null"


@pytest.mark.parametrize(("text", "expected"), OLD_MARGINS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_margin_of_an_old_file_is_read(tmp_path, text, expected):
    """As a file has it that names what it needs, and as a run folder has it, with everything that is not set."""
    saved = {**yaml.safe_load(f"{{{UNSET}}}"), **yaml.safe_load(f"{{{text}}}"), "sample_rate": 0.5}
    for written in (f"head: {{{text}, sample_rate: 0.5}}\n", yaml.safe_dump({"head": saved})):
        config = read(written, tmp_path)
        assert same(config.head.margin.build_margin(torch.tensor([1, 16, 81])), expected)
        assert config.head.sample_rate == 0.5


OLD_OPTIMIZERS: list[tuple[str, str, dict[str, Any], str, dict[str, Any]]] = [
    # name, today's class, what the backbone has; today's class of the head, what it has
    ("sgd", "SGD", {"momentum": 0.8}, "SGD", {"momentum": 0.8}),
    ("adam", "Adam", {}, "Adam", {}),
    ("adamw", "AdamW", {}, "AdamW", {}),
    ("radam", "RAdam", {"decoupled_weight_decay": True}, "RAdam", {"decoupled_weight_decay": True}),
    ("lars", "LARS", {"momentum": 0.8, "trust_coefficient": 0.001}, "SGD", {"momentum": 0.8}),
    ("lamb", "LAMB", {}, "AdamW", {}),
    ("lookahead_sgd", "LookaheadSGD", {"momentum": 0.8, "k": 5, "alpha": 0.5}, "SGD", {"momentum": 0.8}),
    ("lookahead_adamw", "LookaheadAdamW", {"k": 5}, "AdamW", {}),
    ("ranger", "Ranger", {"betas": (0.95, 0.999), "eps": 1e-5, "k": 6}, "RAdam", {"decoupled_weight_decay": True}),
    ("adabelief", "AdaBelief", {}, "AdamW", {}),
    ("yogi", "Yogi", {}, "Adam", {}),
]


@pytest.mark.parametrize(("name", "cls", "backbone", "head", "of_head"), OLD_OPTIMIZERS, ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_an_optimizer_of_an_old_file_is_read(tmp_path, name, cls, backbone, head, of_head):
    old = {"name": name, "lr": 0.2, "head_lr_factor": 0.5, "momentum": 0.8, "weight_decay": 0.02, "head_name": None}
    old |= {"trust_coefficient": None, "lookahead_steps": None, "lookahead_alpha": None}
    config = read(yaml.safe_dump({"optimizer": old}), tmp_path)
    built = config.optimizers.build([nn.Parameter(torch.ones(1))])
    assert type(built).__name__ == cls
    assert {"lr": 0.2, "weight_decay": 0.02, **backbone}.items() <= built.defaults.items()
    found, options = config.optimizers.head_class()
    assert found.__name__ == head and {"lr": 0.1, "weight_decay": 0.02, **of_head}.items() <= options.items()
    assert set(options) - {"betas", "eps"} == {"lr", "weight_decay", *of_head}
    old["head_name"] = "sgd"
    config = read(yaml.safe_dump({"optimizer": old}), tmp_path)
    assert config.optimizers.head_class() == (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.02})
    assert (config.head_lr_factor, config.optimizer.name) == (1.0, cls)


def test_an_old_file_has_the_old_defaults_of_what_it_leaves_out(tmp_path):
    assert read("optimizer: {name: adamw}\n", tmp_path).optimizer == OptimizerSettings(
        "AdamW", {"lr": 0.1, "weight_decay": 0.0005}
    )
    assert read("optimizer: {name: sgd}\n", tmp_path) == RunConfig()
    config = read("optimizer: {lr: 0.3, head_lr_factor: 2}\n", tmp_path)
    assert (config.optimizer.init_args["lr"], config.head_lr_factor) == (0.3, 2.0)
    config = read("optimizer: {name: lars, trust_coefficient: 0.02}\nhead: {margin: arcface}\n", tmp_path)
    assert config.optimizer.init_args["trust_coefficient"] == 0.02
    config = read("optimizer: {name: ranger, lookahead_steps: 3, lookahead_alpha: 0.8}\n", tmp_path)
    given = {key: value for key, value in config.optimizer.init_args.items() if key.startswith("lookahead")}
    assert given == {"lookahead_steps": 3, "lookahead_alpha": 0.8}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: {margin: normface, m: 0.5}", "NormFace has no argument margin; it takes scale"),
        ("head: {margin: softmax, scale: 32}", "Softmax has no argument scale; it takes bias"),
        ("head: {margin: arcface, plus: true}", "ArcFace has no argument plus"),
        ("optimizer: {name: sgd, trust_coefficient: 0.1}", "SGD has no argument trust_coefficient"),
        ("optimizer: {name: sdg}", "optimizer.name is sdg; it was one of sgd, adam, adamw"),
        ("optimizer: {head_name: lamb, name: [sgd]}", "optimizer.name is ['sgd']"),
    ],
)
def test_what_an_old_file_could_not_have_is_refused(tmp_path, capsys, text, words):
    assert words in refused(f"{text}\n", tmp_path, capsys)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--head.margin arcface", "--head.margin ArcFace"),
        ("--head.margin=cosface --head.m=0.4 --head.scale 64", "--head.margin CosFace --head.margin.scale 64 --head.margin.margin 0.4"),
        ("--head.scale 16", "--head.margin.scale 16"),
        ("--head.margin elastic_cos --head.sigma 0.1", "--head.margin ElasticFace --head.margin.kind cos --head.margin.deviation 0.1"),
        ("--head.margin adaptive --head.l_m 0.1", "--head.margin AdaptiveMargin --head.margin.smallest 0.1"),
        ("--head.margin magface --head.lambda_g 7", "--head.margin MagFace --head.margin.penalty_weight 7"),
        ("--head.margin AdaFace --head.statistics_momentum 0.1", "--head.margin.momentum 0.1"),
        ("--optimizer.name lars --optimizer.head_lr_factor 0.01", "--optimizer LARS --head_lr_factor 0.01"),
        ("--optimizer.name radam", "--optimizer RAdam --optimizer.decoupled_weight_decay true"),
        ("--optimizer.head_name sgd", "--head_optimizer SGD --head_optimizer.lr RATE (its own, not a factor)"),
    ],
)  # fmt: skip
def test_old_options_are_refused_with_the_new_ones(tmp_path, capsys, old, new):
    said = refused("seed: 1\n", tmp_path, capsys, *old.split())
    assert f"of an earlier version; write {new}\n" in said
    if "AdaFace" not in old:  # which is given already
        read("seed: 1\n", tmp_path, *new.replace("RATE (its own, not a factor)", "1.0").split())


def old_form(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of ArcFace with SGD as an earlier version saved them."""
    margin = config["head"].pop("margin")["init_args"]
    optimizer = config.pop("optimizer")["init_args"]
    del config["head_optimizer"], config["head_skipped_rows"]
    unset = {**yaml.safe_load(f"{{{UNSET}}}"), "margin": "arcface", "scale": margin["scale"]}
    given = {name: optimizer[name] for name in ("lr", "momentum", "weight_decay")}
    more = {"name": "sgd", "head_lr_factor": config.pop("head_lr_factor"), "head_name": None, "trust_coefficient": None}
    return {**config, "head": {**unset, **config["head"]}, "optimizer": {**given, **more}}


def test_a_run_of_an_earlier_version_goes_on_exactly(tmp_path, mistake):
    """Its folder has settings in the old form: it is resumed and evaluated, and laid beside a run of today."""
    settings = ["--data.identities", "30", "--train.batch_size", "64", "--train.epochs", "2", "--output.log_every", "1"]
    settings += ["--head_lr_factor", "2", "--output.folder", str(tmp_path / "run")]
    assert main(["train", QUICKSTART, *settings]) == 0
    rows = logged(tmp_path / "run")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(max((again / "checkpoints").glob("step-*")))
    old = old_form(yaml.safe_load((again / "config.yaml").read_text()))
    (again / "config.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    assert "was run with head.margin.scale = 32.0, and this asks for 16.0" in mistake(
        "train", "--resume", str(again), "--head.margin.scale", "16"
    )
    assert "--head.scale 32: of an earlier version; write --head.margin.scale 32" in mistake(
        "train", "--resume", str(again), "--head.scale", "32"
    )
    assert main(["train", "--resume", str(again)]) == 0
    assert logged(again) == rows
    assert "name: sgd" in (again / "config.yaml").read_text(), "the folder keeps its settings"
    assert main(["evaluate", str(again)]) == 0
    assert main(["report", str(tmp_path / "run"), str(again), "--output", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert 'Settings that differ</h2>\n<p class="note">None.' in page


@pytest.mark.slow
def test_a_run_of_a_margin_of_ones_own_is_resumed_where_it_is_trusted(own, tmp_path, monkeypatch, capsys):
    import subprocess
    import sys

    settings = ["--data.identities", "30", "--train.batch_size", "64", "--train.epochs", "1", "--train.cpu", "true"]
    folder = tmp_path / "run"
    settings += ["--head.margin", f"{own}.MyMargin", "--head.margin.x", "2", "--optimizer", f"{own}.MySGD"]
    assert main(["train", *settings, "--output.folder", str(folder)]) == 0
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["head"]["margin"] == {"class_path": f"{own}.MyMargin", "init_args": {"scale": 64.0, "x": 2}}
    assert json.loads((folder / "metrics.json").read_text())
    command = [sys.executable, "-m", "partial_fc", "train", "--resume", str(folder)]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{ROOT}")
    for more, trusted in (([], False), (["--head.margin", f"{own}.MyMargin"], True)):
        done = subprocess.run([*command, "--check", *more], capture_output=True, text=True)
        assert done.returncode == (0 if trusted else 2), done.stderr
        assert trusted or f"set {TRUST}={own} in the environment" in done.stderr
    monkeypatch.setenv(TRUST, own)
    done = subprocess.run([*command, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_heads_of_mixed_sets_have_arguments_of_their_own():
    head = HeadConfig(MarginSettings("CosFace", {"scale": 8.0}))
    assert head.margin.with_arguments("data.mix b", margin=0.1) == MarginSettings(
        "CosFace", {"scale": 8.0, "margin": 0.1}
    )
    with pytest.raises(UserError, match=r"--data.mix b: Softmax has no argument scale; leave it out"):
        MarginSettings("Softmax").with_arguments("data.mix b", scale=4.0)
