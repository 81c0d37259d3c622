"""The formats that data can have on disk, one module each.

    detect.py                   which format a folder has; opens it
    folder.py                   sub-folders of images
    list_file.py                lines `path label`
    recordio.py record_file.py  InsightFace's RecordIO: the data set, and the bytes of its files
    tar_files.py                WebDataset
    parquet.py                  Hugging Face `datasets`
    packed.py                   memory-mapped pixels, as `partial-fc data glyphs` writes them
    embedded_glyphs.py          the 1,300 characters that come with the package

    file_labels.py              labels and names as files have them -> labels 0..C-1
    split_names.py              train-00000.tar, test-00000.tar: which split a file belongs to

To add a format: write a module with a subclass of `EncodedIdentities` that implements `encoded_at` and `name_at`; add
its name to `Format` in data/config.py; say in detect.py how to recognise it (`_LOOKED_FOR`, `_files_of_format`) and how
to open it (`open_source`); describe it in docs/data.md; add a function that writes it to tests/support/data_files.py,
so that the tests of all formats cover it. A writer in data/writers.py makes it a destination of `partial-fc data
convert`.
"""
