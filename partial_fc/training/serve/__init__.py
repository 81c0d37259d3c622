"""A gallery behind a local web page and a small HTTP interface.

    uploads.py       checks of images from strangers
    recogniser.py    search, compare, add, remove: what is done, without HTTP
    duplicates.py    the likely duplicates of an audit
    guard.py         who may ask, and how much may be sent
    app.py           routes, answers, errors
    server.py        port, token, loop
    page/            the page: HTML, style and script, without anything from elsewhere

docs/serve.md is for users.
"""
