"""H_res, gains and gradients while a model trains: measured, reduced over ranks, reported."""
