"""A gallery of enrolled identities: embeddings in files that are changed atomically, and a search among them.

    embeddings [n, D], identities [n]   ── build, add ──>    rows: one an identity (mean), or one an image (all)
    queries [m, D]                      ── search ──>        for each the k nearest identities, or `nobody`
    a data set with labels              ── calibrate ──>     the threshold of cosines for a false accept rate

    from partial_fc.training.gallery import Gallery

    gallery = Gallery.build("people", embeddings, identities, pictures=paths, backbone=embedder.digest,
                            preprocessing=embedder.preprocessing)          # UserError if the folder is in use
    gallery = Gallery.open("people")                                        # UserError that names what is wrong
    gallery.check_backbone(embedder.digest, embedder.dimension, embedder.preprocessing)
    gallery.calibrate(embeddings, identities, far=1e-4)                     # sets gallery.threshold
    gallery.add(embeddings, identities)                                     # existing="extend" or "replace"
    gallery.remove(["Ada"])
    for answer in gallery.search(queries, k=5):                             # one `Answer` a query
        answer.nobody                                                       # nobody reaches the threshold
        answer.identity                                                     # the best one, None if `nobody`
        for match in answer.matches:                                        # best first, each identity once
            match.identity, match.cosine, match.picture, gallery.thumbnail(match.row)
    gallery.threshold, gallery.dimension, len(gallery), gallery.identities, gallery.backbone, gallery.index

All methods may be called by several threads, and several processes may use one folder: a change waits for the one
before it (a file lock), and searches see the gallery before or after a change, never between. A process that is killed
in a change leaves the gallery as it was before. Changes by other processes are seen by the next search.

`Embedder` (training/embedding.py) makes the embeddings of images. They need not be of unit length.

    gallery.py        `Gallery`: what can be done with one
    manifest.py       gallery.json, which names the files that count; replaced in one move
    segments.py       files of rows, written once
    enrolment.py      given embeddings -> rows
    loaded.py         the rows in memory, brought up to date from the files
    index.py          faiss: exact search, or codes beyond `FLAT_BELOW` rows
    calibration.py    the threshold
    sharing.py        searches together, changes alone
"""

from partial_fc.training.gallery.calibration import Calibration
from partial_fc.training.gallery.enrolment import Enrolment
from partial_fc.training.gallery.gallery import Answer, Gallery, Match

__all__ = ["Answer", "Calibration", "Enrolment", "Gallery", "Match"]
