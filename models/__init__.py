"""Import paths of the technical guide; re-exports of `recursify`."""
