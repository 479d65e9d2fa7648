"""Where bytes lie: plain files, members of tars, objects behind URLs; each opens as a file that can be read."""
