"""Images sorted by identity, from the embedded glyphs or from files in any of the formats of docs/data.md.

    dataset.py                            what a data set is; settings; fingerprints
    decode.py files.py                    encoded pictures to pixels; bounds, changed files, indices in a cache
    glyphs.py folder.py list_file.py recordio.py tar_shards.py hugging_face.py    the formats
    open.py splits.py                     which format lies there, and which split; training set and held-out identities
    convert.py survey.py                  what `partial-fc data` does

`loader.BatchLoader` makes batches of them.
"""

from partial_fc.training.data.config import Format
from partial_fc.training.data.dataset import (
    DataConfig,
    DataSplits,
    EncodedIdentities,
    IdentityDataset,
    UnreadableImage,
    decode_picture,
    enough,
    what_changed,
)
from partial_fc.training.data.decode import IMAGE_SUFFIXES
from partial_fc.training.data.formats.detect import find_format, open_data, open_source, split_identities
from partial_fc.training.data.formats.embedded_glyphs import GlyphIdentities, GlyphSplit
from partial_fc.training.data.formats.folder import FolderIdentities, image_files, scan_folder
from partial_fc.training.data.formats.list_file import ListIdentities
from partial_fc.training.data.formats.parquet import ParquetIdentities
from partial_fc.training.data.formats.recordio import RecordIdentities
from partial_fc.training.data.formats.tar_files import TarIdentities

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
    "enough",
    "find_format",
    "image_files",
    "open_data",
    "open_source",
    "scan_folder",
    "split_identities",
    "what_changed",
]
