package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
)

// plot draws what bench saved: three panels over the times the pool was overwritten.
func plot(args []string) error {
	f := flag.NewFlagSet("plot", flag.ExitOnError)
	in := f.String("in", "bin/space/results.json", "what bench saved")
	out := f.String("out", "docs/space.svg", "picture")
	_ = f.Parse(args)
	b, err := os.ReadFile(*in)
	if err != nil {
		return err
	}
	var all []result
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	if len(all) < 2 {
		return fmt.Errorf("%s holds %d runs: the first is what the others are compared with", *in, len(all))
	}
	var w strings.Builder
	const width, height, left, top, gap = 860, 190, 60, 50, 60
	fmt.Fprintf(&w, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"13\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", width+left+20, top+3*(height+gap)+10)
	colours := []string{"#999999", "#2a7f62", "#c98b00", "#b5312c"}
	empty := all[0].Ops
	panels := []struct {
		name string
		max  float64
		of   func(s *sample) float64
		unit string
	}{
		{"throughput of 4 KiB random overwrites, in percent of the nearly empty pool's", 140, func(s *sample) float64 { return s.Ops / empty * 100 }, "%"},
		{"write amplification: bytes written to the device per byte stored", 6, func(s *sample) float64 { return s.Amp }, ""},
		{"garbage: dead bytes in used segments, in percent of the pool", 60, func(s *sample) float64 { return s.Garbage * 100 }, "%"},
	}
	reach := 0.0
	for i := range all {
		for j := range all[i].Samples {
			reach = max(reach, all[i].Samples[j].Overwrit)
		}
	}
	for p, panel := range panels {
		y0 := top + p*(height+gap)
		fmt.Fprintf(&w, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s</text>\n", left, y0-8, panel.name)
		for i := range 5 {
			v := panel.max * float64(i) / 4
			y := float64(y0) + height - height*float64(i)/4
			fmt.Fprintf(&w, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#dddddd\"/><text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g%s</text>\n", left, left+width, y, y, left-6, y+4, v, panel.unit)
		}
		for i := range all {
			var points []string
			for j := range all[i].Samples {
				s := &all[i].Samples[j]
				// The mean of five windows: one second is noise.
				sum, n := 0.0, 0
				for k := max(0, j-2); k <= min(len(all[i].Samples)-1, j+2); k++ {
					sum += panel.of(&all[i].Samples[k])
					n++
				}
				x := left + width*s.Overwrit/reach
				y := float64(y0) + height - height*min(sum/float64(n)/panel.max, 1)
				points = append(points, fmt.Sprintf("%.1f,%.1f", x, y))
			}
			fmt.Fprintf(&w, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"1.6\" points=\"%s\"/>\n", colours[i%len(colours)], strings.Join(points, " "))
			if p == 0 {
				fmt.Fprintf(&w, "<text x=\"%d\" y=\"14\" fill=\"%s\" font-weight=\"bold\">%.0f %% full</text>\n", left+i*95, colours[i%len(colours)], all[i].Fill*100)
			}
		}
	}
	fmt.Fprintf(&w, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">overwritten so far, in sizes of the pool (0 to %.1f)</text>\n</svg>\n", left+width/2, top+3*(height+gap)-30, reach)
	return os.WriteFile(*out, []byte(w.String()), 0o644)
}
