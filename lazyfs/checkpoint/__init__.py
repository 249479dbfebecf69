"""From a reference to what is shown: reference, manifest, CRIU layer, tree."""
