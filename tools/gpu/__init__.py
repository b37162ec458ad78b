"""What a GPU does with PST, measured in ten minutes, beside what ``pst-ds plan`` predicts: ``make gpu``."""
