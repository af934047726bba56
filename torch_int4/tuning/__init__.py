"""Finding the cheapest recipe that keeps the loss: scores, paired errors, sensitivity, `autotune`."""
