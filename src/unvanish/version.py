"""The version, in one place: read by the build and by the reports."""

VERSION = "0.1.0"
