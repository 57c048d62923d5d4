"""The report on GLUE: a page and its plots, made of result files alone."""
