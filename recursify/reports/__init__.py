"""What pages of results are made of: HTML parts, SVG charts, style sheets. What a page says stands with what it reports on.

Imports `utils` only; knows no model. Start with `html.py` (the document and its parts), then `charts.py` (line charts and the picture of an
architecture). The pages themselves are evaluation/page.py and demo/report.py.
"""
