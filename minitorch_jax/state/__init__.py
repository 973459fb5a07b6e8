"""State that changes over time: cells, the trees of cells in modules and optimizers, rules for reading and writing them."""
