"""The commands of `cxrloop`: parse options, call one function, print its result."""
