"""The evidence: a small captioned world, the training of the embedded model, and one study per paper."""
