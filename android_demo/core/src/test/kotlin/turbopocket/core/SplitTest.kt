// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import turbopocket.core.noise.StandardNormal

/** What needs nothing of Python. */
class SplitTest {
    @Test
    fun `noise in pieces is noise at once`() {
        val pieces = StandardNormal(5).let { it.next(3) + it.next(1) + it.next(996) }
        assertTrue(pieces.contentEquals(StandardNormal(5).next(1000)))
    }
}
