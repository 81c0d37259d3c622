"""Pairs in `.bin` files: figures against scikit-learn and the published evaluation's rule in numpy; nothing in a file
is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from torch import Tensor

from partial_fc.training.data import UnreadableImage
from partial_fc.training.errors import UserError
from partial_fc.training.protocols import PairImages, pickled, read_pair_images, verify_embeddings
from partial_fc.training.protocols.pairs import folds_of
from partial_fc.training.protocols.pickled import load_pairs
from partial_fc.training.protocols.tasks import Verification

SHAPE = (3, 12, 12)


def encoded(seed: int, size: int = 12, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


IMAGES = [encoded(i) for i in range(8)]
SAME = [True, False, True, False]


def some_pairs(pairs: int = 203, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings `[2P, 16]` whose genuine and impostor scores overlap; same `[P]`, in no order, not as many of either
    kind in a fold."""
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.4
    first = rng.normal(size=(pairs, 16))
    second = np.where(same[:, None], first + 1.1 * rng.normal(size=(pairs, 16)), rng.normal(size=(pairs, 16)))
    lengths = rng.uniform(0.5, 20, (2 * pairs, 1))
    return torch.from_numpy(np.stack((first, second), 1).reshape(-1, 16) * lengths), torch.from_numpy(same)


def published_accuracy(embeddings: np.ndarray, same: np.ndarray) -> tuple[float, float]:
    """Ten folds of scikit-learn, thresholds 0 to 4 in steps of 0.01 on squared distances, the first best on nine folds,
    on the tenth."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    distances = ((unit[0::2] - unit[1::2]) ** 2).sum(1)
    scores = []
    for train, test in KFold(10, shuffle=False).split(distances):
        best = max(np.arange(0, 4, 0.01), key=lambda t: ((distances[train] < t) == same[train]).mean())
        scores.append(((distances[test] < best) == same[test]).mean())
    return float(np.mean(scores)), float(np.std(scores))


# ---------------------------------------------------------------------------------------------------- figures


def test_accuracy_is_that_of_the_published_rule_and_tar_that_of_scikit_learn():
    embeddings, same = some_pairs()
    result = verify_embeddings(embeddings, same, name="lfw", block=37)
    assert (result.figures["accuracy"], result.figures["accuracy_std"]) == pytest.approx(
        published_accuracy(embeddings.numpy(), same.numpy())
    )
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    cosines = (unit[0::2] * unit[1::2]).sum(1).numpy()
    false_accepts, true_accepts, _ = roc_curve(same.numpy(), cosines, drop_intermediate=False)
    for key, far in (("1e-1", 0.1), ("1e-2", 0.01)):
        # the scores of so few pairs lie farther apart than a bin
        assert result.figures[f"tar@{key}"] == pytest.approx(true_accepts[false_accepts <= far].max())
        threshold = result.thresholds[f"tar@{key}"]
        assert threshold is not None
        assert (cosines[~same.numpy()] >= threshold).mean() <= far
    assert int((~same).sum()) < 1000
    assert result.figures["tar@1e-3"] is None, "less than one impostor pair"
    crossing = abs(false_accepts + true_accepts - 1).argmin()
    assert result.figures["eer"] == pytest.approx((false_accepts[crossing] + 1 - true_accepts[crossing]) / 2, abs=0.02)
    assert 0.5 < result.figures["accuracy"] < 1
    assert result.counts == {"pairs": 203, "genuine": int(same.sum()), "impostor": int((~same).sum()), "left out": 0}
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["curves"]["roc"][-1] == [1, 1]


@pytest.mark.parametrize("count", [10, 19, 203])
def test_folds_are_those_of_scikit_learn(count):
    folds = folds_of(count)
    for fold, (_, test) in enumerate(KFold(10).split(np.zeros(count))):
        assert (folds == fold).nonzero().flatten().tolist() == test.tolist()


def test_of_equally_good_thresholds_the_smallest_is_tested():
    """Nine folds are told apart by any threshold from 0.5 to 1.5 (squared distance); the tenth by those above 1
    alone."""

    def at(distance: float) -> list[list[float]]:
        cosine = 1 - distance / 2
        return [[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]]

    rows, same = [], []
    for fold in range(10):
        rows += at(1.0 if fold == 9 else 0.495) + at(1.505)
        same += [True, False]
    result = verify_embeddings(torch.tensor(rows, dtype=torch.float64), torch.tensor(same), name="x")
    assert result.figures["accuracy"] == pytest.approx((9 + 0.5) / 10)
    assert verify_embeddings(torch.tensor(rows[:36]), torch.tensor(same[:18]), name="x").figures["accuracy"] == 1
    assert verify_embeddings(torch.tensor(rows[:12]), torch.tensor(same[:6]), name="x").figures["accuracy"] is None


def test_the_hardest_pairs_are_those_of_sorted_cosines():
    embeddings, same = torch.randn(60, 8, generator=torch.Generator().manual_seed(2)), torch.arange(30) % 2 == 0
    readable = torch.ones(60, dtype=torch.bool)
    readable[5] = False
    found = verify_embeddings(embeddings, same, name="x", readable=readable).hardest
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    every = [(float(unit[2 * i] @ unit[2 * i + 1]), 2 * i, 2 * i + 1) for i in range(30) if i != 2]
    wanted = {
        "genuine": sorted(pair for pair in every if same[pair[1] // 2])[:12],
        "impostor": sorted((pair for pair in every if not same[pair[1] // 2]), reverse=True)[:12],
    }
    for kind, pairs in wanted.items():
        assert [pair[1:] for pair in found[kind]] == [pair[1:] for pair in pairs]
        assert [pair[0] for pair in found[kind]] == pytest.approx([pair[0] for pair in pairs])


def test_shares_of_ranks_add_up_to_one_rank():
    embeddings, same = some_pairs(41)
    alone = verify_embeddings(embeddings, same, name="lfw")
    asked: list[list[Tensor]] = [[], [], []]

    def keep(part: Tensor, rank: int) -> Tensor:
        asked[rank].append(part.clone())
        return part

    for rank in range(3):
        verify_embeddings(embeddings, same, name="lfw", rank=rank, world=3, reduce=partial(keep, rank=rank))
    sums = iter([torch.stack(parts).sum(0) for parts in zip(*asked, strict=True)])
    assert verify_embeddings(embeddings, same, name="lfw", rank=1, world=3, reduce=lambda _: next(sums)) == alone


def test_a_pair_with_a_damaged_image_is_left_out_and_the_folds_stay():
    embeddings, same = some_pairs(100)
    readable = torch.ones(200, dtype=torch.bool)
    readable[[0, 5, 131]] = False
    damaged = torch.where(readable[:, None], embeddings, torch.nan)
    result = verify_embeddings(damaged, same, name="lfw", readable=readable)
    assert (result.counts["pairs"], result.counts["left out"]) == (97, 3) and "3 pairs" in result.summary()
    kept = np.setdiff1d(np.arange(100), [0, 2, 65])
    unit = torch.nn.functional.normalize(embeddings, dim=1).numpy()
    distances = ((unit[0::2] - unit[1::2]) ** 2).sum(1)
    scores = []
    for fold in range(10):
        train, test = kept[kept // 10 != fold], kept[kept // 10 == fold]
        best = max(np.arange(0, 4, 0.01), key=lambda t: ((distances[train] < t) == same.numpy()[train]).mean())
        scores.append(((distances[test] < best) == same.numpy()[test]).mean())
    assert result.figures["accuracy"] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize(
    ("embeddings", "same", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, dtype=torch.bool), "two embeddings"),
        (torch.ones(4, 4), torch.ones(2, dtype=torch.bool), "no pair of two identities"),
        (torch.ones(4, 4), torch.zeros(2, dtype=torch.bool), "no pair of one identity"),
        (torch.full((4, 4), torch.nan), torch.tensor([True, False]), "4 of 4 embeddings are not finite"),
    ],
)
def test_bad_embeddings_are_a_user_error(embeddings, same, message):
    with pytest.raises(UserError, match=message):
        verify_embeddings(embeddings, same, name="lfw")


# ---------------------------------------------------------------------------------------------------- files


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """As cPickle of Python 2 wrote it, protocol 2: byte strings as BINSTRING, which Python 3 cannot write."""
    out = b"\x80\x02]q\x01("
    for image in images:
        out += b"T" + struct.pack("<i", len(image)) + image
    return out + b"e]q\x02(" + b"".join(b"\x88" if each else b"\x89" for each in same) + b"e\x86q\x03."


def python2_arrays(images: list[bytes], same: list[bool]) -> bytes:
    """Images as NumPy arrays of Python 2, booleans as its scalars."""
    dtype = b"cnumpy\ndtype\n(U\x02%sK\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    out = b"\x80\x02]("
    for image in images:
        out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        out += (
            b"(K\x01J"
            + struct.pack("<i", len(image))
            + b"\x85"
            + dtype % b"u1"
            + b"\x89T"
            + struct.pack("<i", len(image))
            + image
            + b"tb"
        )
    out += b"e]("
    for each in same:
        out += b"cnumpy.core.multiarray\nscalar\n(" + dtype % b"b1" + b"U\x01" + (b"\x01" if each else b"\x00") + b"tR"
    return out + b"e\x86."


def python2_text(images: list[bytes], same: list[bool]) -> bytes:
    """As `pickle.dump` of Python 2 wrote it by default, protocol 0: byte strings as their repr, which is that of Python
    3 without the b."""
    out = b"((lp0\n" + b"".join(
        b"S" + repr(image)[1:].encode("ascii") + b"\np%d\na" % n for n, image in enumerate(images, 1)
    )
    return out + b"(lp9\n" + b"".join(b"I01\na" if each else b"I00\na" for each in same) + b"tp10\n."


def python2_text_arrays(images: list[bytes], same: list[bool]) -> bytes:
    """The same of NumPy arrays, and booleans as its scalars."""
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    out = b"((l"
    for image in images:
        out += (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I%d\nt" % len(image)
            + dtype % b"u1"
        )
        out += b"I00\nS" + repr(image)[1:].encode("ascii") + b"\ntba"
    out += b"(l"
    for each in same:
        out += (
            b"cnumpy.core.multiarray\nscalar\n(" + dtype % b"b1" + (b"S'\\x01'\n" if each else b"S'\\x00'\n") + b"tRa"
        )
    return out + b"t."


QUOTES = b"""it's "quoted", back\\slashed,\ta tab,\n\r\0\xff"""
ARRAYS = [np.frombuffer(image, dtype=np.uint8) for image in IMAGES]
FORMS: dict[str, bytes] = {
    **{f"protocol {p}": pickle.dumps((IMAGES, SAME), protocol=p) for p in range(6)},
    **{
        f"arrays, protocol {p}": pickle.dumps((ARRAYS, [np.bool_(each) for each in SAME]), protocol=p)
        for p in (2, 3, 4, 5)
    },
    "own arrays": pickle.dumps(([array.copy() for array in ARRAYS], np.array(SAME)), protocol=5),
    "list of arrays [1, n]": pickle.dumps(([array[None] for array in ARRAYS], SAME), protocol=4),
    "array of objects": pickle.dumps((np.array(IMAGES, dtype=object), np.array(SAME)), protocol=4),
    "bytearrays and numbers": pickle.dumps(
        ([bytearray(image) for image in IMAGES], [int(each) for each in SAME]), protocol=5
    ),
    "bytearrays, protocol 2": pickle.dumps(([bytearray(image) for image in IMAGES], SAME), protocol=2),
    "a list of lists": pickle.dumps([IMAGES, SAME], protocol=2),
    "Python 2": python2(IMAGES, SAME),
    "Python 2, arrays": python2_arrays(IMAGES, SAME),
    "Python 2, protocol 0": python2_text(IMAGES, SAME),
    "Python 2, protocol 0, arrays": python2_text_arrays(IMAGES, SAME),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_that_such_files_have_are_read(form):
    assert load_pairs(FORMS[form]) == (IMAGES, SAME)


def test_strings_of_python_2_are_what_they_were():
    assert load_pairs(python2_text([QUOTES, b"'", b'"', b""], [True, False])) == (
        [QUOTES, b"'", b'"', b""],
        [True, False],
    )


class Evil:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `marker`, or fill the memory; and what the refusal must name."""
    system, command = os.system, f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    global_ = {p: pickle.dumps((IMAGES, [Evil(system, command), *SAME]), protocol=p) for p in (0, 2, 4)}
    return {
        **{f"system, protocol {p}": (data, "posix.system") for p, data in global_.items()},
        "eval": (pickle.dumps(([Evil(eval, code)], SAME)), "builtins.eval"),
        "open": (pickle.dumps(([Evil(open, str(marker), "w")], SAME)), "io.open"),
        "getattr": (b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.", "builtins.getattr"),
        "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
        "another class of numpy": (pickle.dumps((IMAGES, [Evil(np.save, str(marker), [1])])), "numpy.save"),
        "memory map": (pickle.dumps((IMAGES, [Evil(np.memmap, str(marker), "u1", "w+", 0, (9,))])), "numpy.memmap"),
        "an instance": (pickle.dumps((IMAGES, [Path("x")])), "pathlib"),
        "inst": (b"(S'" + command.encode() + b"'\nios\nsystem\n.", "os.system"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "persistent": (b"Pelsewhere\n.", "PERSID"),
        "a state for a permitted function": (
            b"c_codecs\nencode\n}(S'__call__'\nS'x'\nub.",
            "_codecs.encode is given a state",
        ),
        "bytes of a number": (
            b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
            "builtin__.bytes is called with",
        ),
        "a memo of 4e9 entries": (b"\x80\x02Nr\xff\xff\xff\xff.", "uses the memo index 4294967295"),
        "not latin1": (
            b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.",
            "_codecs.encode is called with",
        ),
    }


@pytest.mark.parametrize("kind", hostile(Path("x")))
def test_a_hostile_file_is_refused_by_name_and_nothing_is_run(kind, tmp_path):
    marker = tmp_path / "marker"
    data, named = hostile(marker)[kind]
    (tmp_path / "lfw.bin").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_pair_images(tmp_path / "lfw.bin", SHAPE)
    assert (
        named in str(caught.value)
        and "lfw.bin" in str(caught.value)
        and "none of its code was run" in str(caught.value)
    )
    assert not marker.exists()
    if kind.startswith("system"):  # the payload would have worked
        pickle.loads(data)
        assert marker.exists()


def test_an_array_of_a_petabyte_is_a_number_and_no_memory():
    """The array that NumPy itself would ask the memory for, before it looks at the bytes."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(L1000000000000000L\ntU\x01btR"
    state = b"(K\x01(L1000000000000000L\ntcnumpy\ndtype\n(U\x02u1tR\x89U\x01xtb"
    images, same = load_pairs(b"\x80\x02](" + reconstruct + state + b"U\x01ye]\x88a\x86.")
    assert images == [None, b"y"] and same == [True]


def copies(what: str, element: bytes, times: int) -> bytes:
    """A list of `times` calls of the function `what` with the one `element`, which is written once."""
    called = f"c{what}".encode().replace(b".", b"\n") + b"\n"
    return (
        b"\x80\x05"
        + element
        + b"q\x00"
        + called
        + b"q\x010]("
        + b"h\x01h\x00\x85R" * times
        + b"e]("
        + b"\x88" * (times // 2)
        + b"e\x86."
    )


MANY = 5_000
AMPLIFIERS = {
    "lists": ("builtins.list", b"](" + b"\x88" * MANY + b"e"),
    "lists of tuples": ("builtins.list", b"(" + b"\x88" * MANY + b"t"),
    "bytes of bytearrays": ("builtins.bytes", b"\x96" + struct.pack("<Q", MANY) + bytes(MANY)),
    "encoded text": ("_codecs.encode", b"X" + struct.pack("<I", MANY) + b"x" * MANY),
    "types": ("numpy.dtype", b"X" + struct.pack("<I", MANY) + b"<" + b"x" * (MANY - 1)),
}


@pytest.mark.parametrize("kind", AMPLIFIERS)
def test_a_short_file_does_not_copy_its_longest_element_many_times(kind, monkeypatch):
    made: list[Any] = []
    make = pickled._Constructor.__call__

    def counted(self: Any, *arguments: Any) -> Any:
        made.append(make(self, *arguments))
        return made[-1]

    monkeypatch.setattr(pickled._Constructor, "__call__", counted)
    data = copies(*AMPLIFIERS[kind], times=100)
    with pytest.raises(
        ValueError, match=r"(copies more data than the file contains|called with arguments).*none of its code was run"
    ):
        load_pairs(data)
    assert sum(map(len, made)) <= len(data)


def test_one_bytearray_in_many_places_is_copied_once():
    shared = bytearray(IMAGES[0])
    images, _ = load_pairs(pickle.dumps(([shared] * 8, SAME), protocol=5))
    assert images == [IMAGES[0]] * 8 and len({id(image) for image in images}) == 1
    # a record each, of the same bytes
    array = b"cnumpy.core.numeric\n_frombuffer\n(h\x00cnumpy\ndtype\nU\x02u1\x85RK\x02\x85U\x01CtR"
    images, _ = load_pairs(
        b"\x80\x05\x96" + struct.pack("<Q", 2) + b"xyq\x000](" + array * 8 + b"e](" + b"\x88" * 4 + b"e\x86."
    )
    assert images == [b"xy"] * 8 and len({id(image) for image in images}) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FORMS["protocol 4"][:-40], "truncated or is not a pickle"),
        (FORMS["Python 2"][:1000], "truncated or is not a pickle"),
        (FORMS["Python 2, protocol 0"][:1000], "truncated or is not a pickle"),
        (b"(S'\\x'\nt.", "truncated or is not a pickle"),
        (b"(Sunquoted\nt.", "truncated or is not a pickle"),
        (b"", "truncated or is not a pickle"),
        (b"\xff\xd8\xff a picture", "truncated or is not a pickle"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"abc", "truncated or is not a pickle"),
        (pickle.dumps((IMAGES[:7], SAME)), "7 images and 4 booleans; it must have two images for each"),
        (pickle.dumps((IMAGES, SAME[:3])), "8 images and 3 booleans"),
        (pickle.dumps((IMAGES, [True, False, 2, False])), "not a boolean at position 2"),
        (pickle.dumps((IMAGES, [True, False, "x", False])), "not a boolean at position 2"),
        (pickle.dumps(IMAGES), "does not contain (images, same)"),
        (pickle.dumps((IMAGES, 4)), "no list of booleans"),
        (pickle.dumps((IMAGES, [True] * 4)), "no pair of two identities"),
        (pickle.dumps((IMAGES, [False] * 4)), "no pair of one identity"),
        (pickle.dumps(([], [])), "no pair of one identity"),
    ],
)
def test_a_damaged_file_is_a_user_error(data, message, tmp_path):
    (tmp_path / "lfw.bin").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_pair_images(tmp_path / "lfw.bin", SHAPE)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path / "lfw.bin"))


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.bin cannot be read: No such file"):
        read_pair_images(tmp_path / "none.bin", SHAPE)


def test_images_are_resized_and_a_damaged_one_is_named_by_its_index():
    images = PairImages("lfw", [encoded(0, 30, "PNG"), None, b"no picture", encoded(1)], [True, False], SHAPE)
    assert images.load(0).shape == SHAPE and images.load(0).dtype == torch.uint8
    for index, name in ((1, "lfw image 1"), (2, "lfw image 2")):
        with pytest.raises(UnreadableImage, match=name):
            images.load(index)


def test_a_task_counts_what_cannot_be_read():
    images = PairImages("lfw", [*IMAGES[:5], b"no picture", *IMAGES[6:]], SAME, SHAPE)
    task = Verification("lfw", images)
    readable = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    result = task.measure(lambda *_: (torch.randn(7, 4), readable), tile=4, progress=False)
    assert result.counts == {"pairs": 3, "genuine": 1, "impostor": 2, "left out": 1}
    assert {f"lfw/{name}" for name in task.figures()} >= result.metrics().keys() - {"lfw/accuracy_std"}
