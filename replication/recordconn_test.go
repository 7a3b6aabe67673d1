package replication

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"testing"
)

// trickle is a connection whose reads return what they like.
type trickle struct {
	net.Conn
	text []byte
	r    *rand.Rand
}

func (c *trickle) Read(p []byte) (int, error) {
	if len(c.text) == 0 {
		return 0, io.EOF
	}
	n := min(len(p), 1+c.r.IntN(len(c.text)), len(c.text))
	n = copy(p[:n], c.text)
	c.text = c.text[n:]
	return n, nil
}

// Whatever pieces the socket gives, TLS reads the same bytes, never across the end of a
// record, and More tells the truth.
func TestRecordConn(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		var text []byte
		var ends []int
		for range 1 + r.IntN(20) {
			n := r.IntN(1 << r.IntN(15))
			text = append(text, 23, 3, 3, byte(n>>8), byte(n))
			for range n {
				text = append(text, byte(r.Uint32()))
			}
			ends = append(ends, len(text))
		}
		c := &recordConn{Conn: &trickle{text: text, r: r}}
		var got []byte
		p := make([]byte, 40<<10)
		for {
			end := 0
			for _, e := range ends {
				if end == 0 && e > len(got) {
					end = e
				}
			}
			more := c.More()
			held := c.have - c.at
			if want := end > 0 && len(got)+held >= end; more != want {
				t.Fatalf("seed %d: at %d of a record that ends at %d, %d held: more is %v", seed, len(got), end, held, more)
			}
			n, err := c.Read(p[:1+r.IntN(len(p))])
			got = append(got, p[:n]...)
			if end > 0 && len(got) > end {
				t.Fatalf("seed %d: read beyond the end of a record", seed)
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, text) {
			t.Fatalf("seed %d: %d bytes became %d", seed, len(text), len(got))
		}
	}
}
