"""The import paths of the technical guide; re-exports of `recursify`."""
