"""Commands that put jaxrobust's functions together into the paper's experiments."""
