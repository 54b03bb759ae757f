"""Tests of the conformance suites, with one module for each part of the ports."""
