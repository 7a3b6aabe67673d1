package sim

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestMutantTable holds the list of mutants against the code and against the table of what
// kills them: every switch is in the list, and every mutant has a killer that exists, or an
// argument.
func TestMutantTable(t *testing.T) {
	inCode := map[string]bool{}
	for _, dir := range []string{".", filepath.Join("..", "..", "replication")} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`\bmutant\("([^"]+)"\)`).FindAllStringSubmatch(string(b), -1) {
				inCode[m[1]] = true
			}
		}
	}
	named := func(name string) bool {
		return slices.ContainsFunc(scenarios, func(c scenario) bool { return c.name == name })
	}
	table := readTable(t)
	b, err := os.ReadFile(tableFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants {
		k, killed := table[m.name]
		why, isArgued := argued[m.name]
		switch {
		case !inCode[m.name]:
			t.Errorf("%s cannot be switched off anywhere", m.name)
		case killed == isArgued:
			t.Errorf("%s: killed %v, argued %v", m.name, killed, isArgued)
		case k.scenario != "" && !named(k.scenario), why.scenario != "" && !named(why.scenario):
			t.Errorf("%s: there is no scenario %q%q", m.name, k.scenario, why.scenario)
		case isArgued && !regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(m.name)+` +argued`).Match(b):
			t.Errorf("%s is argued, and %s does not say so", m.name, tableFile)
		}
		delete(inCode, m.name)
		delete(table, m.name)
	}
	for name := range inCode {
		t.Errorf("the switch %s is in no list", name)
	}
	for name := range table {
		t.Errorf("%s: there is no mutant %s", tableFile, name)
	}
	for _, c := range scenarios {
		used := strings.Contains(string(b), "scenario "+c.name+"\n")
		for _, why := range argued {
			used = used || why.scenario == c.name
		}
		if !used {
			t.Errorf("the scenario %q is for no mutant", c.name)
		}
	}
}
