"""Building blocks of self-contained HTML pages: text and tables (html), charts (svg), one style sheet (page.css)."""
