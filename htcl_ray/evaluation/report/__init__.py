"""The report of an evaluation: report.json, its conclusions, and the HTML pages."""
