"""The device tables from which a step is launched, and noticing that they are out of date."""
