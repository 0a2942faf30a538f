"""The MTP head: trained, measured, fetched, put into a model."""
