"""Certificates: random group elements on drawn weights, in double precision."""
