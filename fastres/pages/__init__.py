"""What the HTML pages that fastres writes have in common: their style sheet, small pictures, and numbers as words.

The pages themselves are in the rooms that know their content: an evaluation's report in ``evaluation``, the page of a
table of classes in ``classification.browsing``.
"""
