"""The lab around the methods: configs, data, models, races, plots and the command line."""
