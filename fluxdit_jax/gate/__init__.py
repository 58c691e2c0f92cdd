"""The gate: whether a run's architecture works, measured before weeks of electricity are spent on it.

    album.py         the records under test, with their true pictures
    painter.py       what is asked of the model (`Wanted`), and the model's answer (`Painter`)
    pairing.py       who is paired with whom
    memorisation.py  1: each picture from its own caption and vector
    swap.py          2: the caption of one with the vector of another
    edit.py          3: an edited caption moves the subject
    verdict.py       what a test found: value, threshold, controls, cases
    advice.py        where to look when one fails
    page.py          the report for people (charts.py and style.py are its drawings and its looks)
    requirement.py   what training asks of a report before it starts

A test is a plan (what to draw) and a measure (what the drawings show). Both are independent of the model: the
measure takes any `Draw`, a function from `Wanted`s to pictures. Of a record with several captions it is the first
that all tests ask for.
"""
