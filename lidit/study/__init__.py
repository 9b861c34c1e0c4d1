"""The paper's human evaluation (Figure 6): people compare two pictures at a time, blind, and vote.

collect.py: folders -> pairs    begin.py: pairs -> a new study    store.py: pairs, raters and votes on disk
page.py: what a rater sees      pages/: the templates, one style sheet, one script
serve.py, report.py: the verbs
"""
