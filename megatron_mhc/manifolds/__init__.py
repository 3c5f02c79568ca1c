"""The sets that H_res is kept on, one a file, and the registry that names them."""
