"""Images sorted by identity, from the embedded glyphs or from files in any of the formats of docs/data.md.

    dataset.py                            what a data set is; settings; fingerprints
    decode.py files.py                    encoded pictures to pixels; bounds, changed files, indices in a cache
    glyphs.py folder.py list_file.py recordio.py tar_shards.py hugging_face.py    the formats
    open.py splits.py                     which format lies there, and which split; training set and held-out identities
    convert.py survey.py                  what `partial-fc data` does

`loader.BatchLoader` makes batches of them.
"""

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
from partial_fc.training.data.folder import FolderIdentities, image_files, scan_folder
from partial_fc.training.data.glyphs import GlyphIdentities, GlyphSplit
from partial_fc.training.data.hugging_face import ParquetIdentities
from partial_fc.training.data.list_file import ListIdentities
from partial_fc.training.data.mixed_set import Format
from partial_fc.training.data.open import find_format, open_data, open_source, split_identities
from partial_fc.training.data.recordio import RecordIdentities
from partial_fc.training.data.tar_shards import TarIdentities

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
