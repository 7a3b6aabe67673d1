//go:build !mutants

package sim

import "errors"

// mutant says whether a rule of the model register, or of the model device server, is
// switched off.
func mutant(string) bool { return false }

func setMutant(name string) error {
	if name != "" {
		return errors.New("this binary was built without the tag mutants")
	}
	return nil
}
