"""Data sets: images sorted by identity, in many formats, and the batches made from them. Which file is for what:

    config.py                 the settings `data.*` of a run
    open_data.py splits.py    from settings to training and evaluation sets; held-out identities; changed data
    labels.py                 which identities are trained on, and under which label (labels.csv)

    dataset.py                the interface of every data set: IdentityDataset, EncodedIdentities
    formats/                  one module per format on disk: a new data format goes there (formats/__init__.py says how)
    decode.py                 encoded images to pixels
    safe_files.py             reading untrusted files
    index_cache.py            indices of large files, kept in a cache folder

    samplers.py               the order of an epoch: a new sampler goes here
    loader.py                 batches on every rank: BatchLoader
    augment.py                random changes of training images

    inspection.py             `partial-fc data inspect`
    convert.py writers.py     `partial-fc data convert`
    fonts/                    `partial-fc data glyphs`: a data set drawn from installed fonts

Several data sets in one run, each with its own head: training/mixing.py.
"""

from partial_fc.training.data.config import DataConfig, Format
from partial_fc.training.data.dataset import EncodedIdentities, IdentityDataset, UnreadableImage, decode_picture
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.formats.detect import find_format, open_source
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities, GlyphSplit
from partial_fc.training.data.formats.folder import FolderIdentities, image_files, scan_folder
from partial_fc.training.data.formats.list_file import ListIdentities
from partial_fc.training.data.formats.parquet import ParquetIdentities
from partial_fc.training.data.formats.recordio import RecordIdentities
from partial_fc.training.data.formats.tar_files import TarIdentities
from partial_fc.training.data.open_data import open_data
from partial_fc.training.data.splits import DataSplits, split_identities, what_changed

__all__ = [
    "IMAGE_SUFFIXES",
    "DataConfig",
    "DataSplits",
    "EncodedIdentities",
    "FolderIdentities",
    "Format",
    "GlyphIdentities",
    "GlyphSplit",
    "IdentityDataset",
    "ListIdentities",
    "ParquetIdentities",
    "RecordIdentities",
    "TarIdentities",
    "UnreadableImage",
    "decode_picture",
    "find_format",
    "image_files",
    "open_data",
    "open_source",
    "scan_folder",
    "split_identities",
    "what_changed",
]
