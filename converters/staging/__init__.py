"""A directory that appears whole or not at all: filled beside its destination, then renamed.

The lock of a destination is a file beside it, which also holds the journal of a conversion that can
be resumed. It is removed last.

The caller that replaces a directory names the files to replace. All others are hard-linked into the
stage before the two directories change places, so that no kill can lose one; then the old names are
removed.
"""
