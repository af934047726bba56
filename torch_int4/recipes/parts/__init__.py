"""Parts that the stages of recipes share: blocks with statistics of their inputs, grids, folds, training."""
