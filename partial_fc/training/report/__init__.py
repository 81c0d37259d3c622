"""Pages and plots of runs.

    report.py, report.html.j2     report.html of one run: metrics, plots, pictures, settings
    compare.py, compare.html.j2   one page for several runs: `partial-fc report RUN RUN ...`
    audit.html.j2                 the page of an audit, written by training/audit_page.py
    page.py                       what all pages share: rendering a template, images as data URIs
    formatting.py                 metrics and settings as text, for both pages
    hardest.py                    pictures of the hardest pairs and of the nearest classes
    plots.py                      plots of evaluations and audits: ROC, histograms, DIR, CMC, cosines of classes
    training_plots.py             plots over training steps, of one run or of several
    canvas.py                     what all plots share: colours, style, writing the file

A new plot is a function in plots.py or training_plots.py that draws on `canvas.figure`. `results.write_results` calls
it and writes the file to the folder plots/ of the run; an entry in `report.CAPTIONS` with the caption puts it on the
page.
"""
