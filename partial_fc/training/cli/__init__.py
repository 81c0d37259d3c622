"""The command line, `partial-fc COMMAND ...`.

main.py         the entry point: the table of commands, the usage text, errors and exit codes; train and evaluate
audit.py        audit
backbones.py    backbones
comms.py        comms
data.py         data inspect, data convert; hands over to glyphs.py
doctor.py       doctor
embed.py        embed
export.py       export-backbone
gallery.py      gallery build, add, remove, search, calibrate, info
glyphs.py       data glyphs
plan.py         plan
protocols.py    verify, templates, identify, retrieve
report.py       report
weights.py      export, import
parser.py       shared: the parser class, options that several commands have

A new command gets a file of its own here: a function that builds its parser (`CommandParser` of parser.py), and a
function `NAME_command(arguments)` that raises UserError for mistakes and returns None or an exit code. Then add it to
`commands` and `USAGE` in main.py, or to `COMMANDS` in data.py if it works on data sets without a run.
"""
