"""The paper's human evaluation (Figure 6): a blind page that compares folders of pictures pairwise, and its report.

collect.py: folders -> pairs    store.py: pairs, raters and votes on disk    page.py: what a rater sees
serve.py, report.py: the verbs  pages/: the templates, one style sheet, one script
"""
