"""The request, the error tree and the Protocols that all parts share."""
