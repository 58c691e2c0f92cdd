"""Is it any good? What a model draws for captions that it was not trained on, in numbers that have a best and a worst.

measured.py      a number with its interval, and what it is for true pictures and for useless ones
measures.py      likeness, following captions and vectors, copying, diversity: of vision vectors, in numpy
"""
