"""`make compat`: exports of every family, written here and read by transformers 4.57 in an environment of its own."""
