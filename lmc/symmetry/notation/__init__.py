"""Groups as text, one axis pattern for each tensor, such as "h (c .)"."""
