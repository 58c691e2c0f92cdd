"""The gate: whether a run's architecture works, measured before weeks of electricity are spent on it.

    eval_set.py      the records under test, with their true pictures and their places in the grid
    sampler.py       what is asked of the model (`Request`), and the model's answer (`Sampler`)
    retrieval.py     the one measure: is the drawn picture nearest to the known answer, among all of the set?
    memorisation.py  1: each picture from its own caption and vector
    swap.py          2: the caption of one photograph with the vector of another
    edit.py          3: the caption of the other view
    verdict.py       what a test found: value, threshold, controls, cases
    noise_levels.py  how much of the training teaches the light
    advice.py        where to look when one fails
    page.py          the report for people
    requirement.py   what training asks of a report before it starts

A test is a plan (what to draw, and which picture of the set is right) and a measure (what the drawings retrieve). Both
are independent of the model: the measure takes any `Draw`, a function from `Request`s to pictures. Of a
record with several captions it is the first that all tests ask for.
"""
