"""Tables, pictures, pages and comparisons, from the records of runs alone."""
