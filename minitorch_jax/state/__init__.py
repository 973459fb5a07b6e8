"""What changes over time: cells, the trees of cells that modules and optimizers are, and who may read and change them."""
