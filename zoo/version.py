"""The version of zoo, which the build and every written file take from here."""

VERSION = "0.1.0"
