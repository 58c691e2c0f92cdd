"""Is it any good? What a model draws for captions that it was not trained on, in numbers that have a best and a worst.

eye.py           what looks at pictures: the dataset's vision encoder
exam.py          what a model is asked, and what true and useless pictures would answer
exam_file.py     an exam that is kept
answers.py       what it draws (`Pupil`)
measured.py      a number with its interval, and its best and worst
measures.py      likeness, following captions and vectors, copies, diversity: of vision vectors, in numpy
scores.py        all of them, with names and words
page.py          the report
"""
