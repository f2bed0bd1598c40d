"""Parts of report pages: HTML templates, SVG charts, style sheets. The text of a page is in the package that it reports on.

Imports `utils` only; knows no model. Start with `html.py` (the document and its parts), then `charts.py` (line charts and the picture of an
architecture). The pages themselves are evaluation/page.py and demo/report.py.
"""
