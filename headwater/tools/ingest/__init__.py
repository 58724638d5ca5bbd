"""Read what people have, folders, manifests, films, corpora and robot logs, into samples."""
